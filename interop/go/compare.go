package main

import (
	"bytes"
	"cmp"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/float16"
)

// compare tells how a stream differs from the expected one, wherever the batches of each begin and end.
func compare(received, expected stream) error {
	if came, wanted := received.describe(), expected.describe(); came != wanted {
		return fmt.Errorf("schema %s came, expected was %s", came, wanted)
	}
	if came, wanted := received.rows(), expected.rows(); came != wanted {
		return fmt.Errorf("%d rows came, expected were %d", came, wanted)
	}
	for column, field := range expected.schema.Fields() {
		if err := compareValues(received.values(column), expected.values(column)); err != nil {
			return fmt.Errorf("column %d %q, %w", column, field.Name, err)
		}
	}
	return nil
}

// compareValues takes as many values of both: each column of a batch has as many as the batch has rows.
func compareValues(received, expected iter.Seq[any]) error {
	next, stop := iter.Pull(received)
	defer stop()
	row := 0
	for wanted := range expected {
		if came, _ := next(); !same(came, wanted) {
			return fmt.Errorf("row %d: %.200q came, expected was %.200q", row, fmt.Sprint(came), fmt.Sprint(wanted))
		}
		row++
	}
	return nil
}

// same compares Go's values of two arrays of one type, in which dictionaries and runs are no more. It panics on a kind
// that == is not for, which fails the case.
func same(left, right any) bool {
	if left == nil || right == nil {
		return left == nil && right == nil
	}
	switch left := left.(type) {
	case []any: // lists, pairs of maps, name and value in structs, type code and value of unions
		return slices.EqualFunc(left, right.([]any), same)
	case []byte:
		return bytes.Equal(left, right.([]byte))
	case float16.Num:
		return same(left.Float32(), right.(float16.Num).Float32())
	case float32:
		return cmp.Compare(left, right.(float32)) == 0 // unlike for ==, NaN is NaN
	case float64:
		return cmp.Compare(left, right.(float64)) == 0
	}
	return left == right
}

func (s stream) values(column int) iter.Seq[any] {
	return func(yield func(any) bool) {
		for _, batch := range s.batches {
			values := batch.Column(column)
			for row := range values.Len() {
				if !yield(array.ValueAsAny(values, row)) {
					return
				}
			}
		}
	}
}

func (s stream) rows() (total int64) {
	for _, batch := range s.batches {
		total += batch.NumRows()
	}
	return total
}

// describe tells all that arrow-go keeps of a schema; it forgets what the fields in maps and runs are called. Its own
// equality overlooks more names, and minds the order of metadata in some types.
func (s stream) describe() string {
	return describeFields(s.schema.Fields()) + describeMetadata(s.schema.Metadata())
}

func describeFields(fields []arrow.Field) string {
	var texts []string
	for _, field := range fields {
		text := fmt.Sprintf("%q: %s", field.Name, describeType(field.Type))
		if !field.Nullable {
			text += " not null"
		}
		texts = append(texts, text+describeMetadata(field.Metadata))
	}
	return "(" + strings.Join(texts, ", ") + ")"
}

func describeType(dataType arrow.DataType) string {
	if dictionary, ok := dataType.(*arrow.DictionaryType); ok {
		values := describeType(dictionary.ValueType)
		return fmt.Sprintf("dictionary(%v, %s, ordered=%t)", dictionary.IndexType, values, dictionary.Ordered)
	}
	nested, ok := dataType.(arrow.NestedType)
	if !ok {
		return dataType.String()
	}
	text := nested.Name()
	switch nested := nested.(type) {
	case *arrow.FixedSizeListType:
		text += fmt.Sprintf("[%d]", nested.Len())
	case *arrow.MapType:
		text += fmt.Sprintf("[sorted=%t]", nested.KeysSorted)
	case arrow.UnionType:
		text += fmt.Sprint(nested.TypeCodes())
	}
	return text + describeFields(nested.Fields())
}

func describeMetadata(metadata arrow.Metadata) string {
	if metadata.Len() == 0 {
		return ""
	}
	var pairs []string
	for i, key := range metadata.Keys() {
		pairs = append(pairs, fmt.Sprintf("%q: %q", key, metadata.Values()[i]))
	}
	slices.Sort(pairs)
	return fmt.Sprintf(" %v", pairs)
}
