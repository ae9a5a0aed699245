// Command flight-check compares what DoGet sends for every NAME.ticket of a folder with the Arrow IPC stream in NAME.arrow.
// Where there is a NAME.headers, its lines "name: value" are sent along.
// For a URL of grpc+tls://, CA is a PEM file of whom to trust, CERTIFICATE and KEY are shown to it.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// A server that never answers fails its case, and the others still run.
const timeout = 5 * time.Minute

func main() {
	if !slices.Contains([]int{3, 4, 6}, len(os.Args)) {
		fmt.Fprintln(os.Stderr, "usage: flight-check URL FOLDER [CA [CERTIFICATE KEY]]")
		os.Exit(2)
	}
	failed, err := run(os.Args[1], os.Args[2], os.Args[3:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "flight-check:", err)
		os.Exit(2)
	}
	if failed > 0 {
		os.Exit(1)
	}
}

func run(location, folder string, pems []string) (failed int, err error) {
	address, ok := strings.CutPrefix(location, "grpc://")
	security := insecure.NewCredentials()
	if len(pems) > 0 {
		address, ok = strings.CutPrefix(location, "grpc+tls://")
		if security, err = tlsOf(pems); err != nil {
			return 0, err
		}
	}
	if !ok {
		return 0, fmt.Errorf("%q is not like grpc://127.0.0.1:8000, nor grpc+tls:// with a CA", location)
	}
	names, err := cases(folder)
	if err != nil {
		return 0, err
	}
	client, err := flight.NewClientWithMiddleware(address, nil, nil, grpc.WithTransportCredentials(security))
	if err != nil {
		return 0, err
	}
	defer client.Close()
	for _, name := range names {
		if err := check(client, filepath.Join(folder, name)); err != nil {
			failed++
			fmt.Printf("FAIL %s: %s\n", name, strings.NewReplacer("\n", " ", "\r", " ").Replace(err.Error()))
		} else {
			fmt.Println("ok", name)
		}
	}
	fmt.Printf("%d passed, %d failed\n", len(names)-failed, failed)
	return failed, nil
}

func tlsOf(pems []string) (credentials.TransportCredentials, error) {
	ca, err := os.ReadFile(pems[0])
	if err != nil {
		return nil, err
	}
	config := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	if !config.RootCAs.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s has no certificate", pems[0])
	}
	if len(pems) == 3 {
		own, err := tls.LoadX509KeyPair(pems[1], pems[2])
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{own}
	}
	return credentials.NewTLS(config), nil
}

func cases(folder string) (names []string, err error) {
	entries, err := os.ReadDir(folder)
	for _, entry := range entries {
		if name, ok := strings.CutSuffix(entry.Name(), ".ticket"); ok {
			names = append(names, name)
		}
	}
	if err == nil && len(names) == 0 {
		err = fmt.Errorf("there is no NAME.ticket in %s", folder)
	}
	slices.Sort(names) // the entries are sorted with their suffixes, which puts a-b before a
	return names, err
}

func check(client flight.Client, path string) (err error) {
	// The readers make errors of their own panics. Those of the arrays that they made are left.
	defer func() {
		if reason := recover(); reason != nil {
			err = fmt.Errorf("panic: %v", reason)
		}
	}()
	expected, err := readFile(path + ".arrow")
	if err != nil {
		return fmt.Errorf("what is expected: %w", err)
	}
	received, err := readFlight(client, path)
	if err != nil {
		return err
	}
	return compare(received, expected)
}

type stream struct {
	schema  *arrow.Schema
	batches []arrow.RecordBatch
}

func readFile(path string) (stream, error) {
	file, err := os.Open(path)
	if err != nil {
		return stream{}, err
	}
	defer file.Close()
	reader, err := ipc.NewReader(bufio.NewReader(file))
	if err != nil {
		return stream{}, err
	}
	return readAll(reader)
}

func readFlight(client flight.Client, path string) (stream, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	headers, err := os.ReadFile(path + ".headers")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return stream{}, err
	}
	for line := range strings.Lines(string(headers)) {
		// A line without a colon makes a name that gRPC refuses.
		name, value, _ := strings.Cut(line, ":")
		ctx = metadata.AppendToOutgoingContext(ctx, name, strings.TrimSpace(value))
	}
	ticket, err := os.ReadFile(path + ".ticket")
	if err != nil {
		return stream{}, err
	}
	messages, err := client.DoGet(ctx, &flight.Ticket{Ticket: ticket})
	if err != nil {
		return stream{}, err
	}
	reader, err := flight.NewRecordReader(messages)
	if err != nil {
		return stream{}, fmt.Errorf("before a schema came: %w", err)
	}
	return readAll(reader)
}

func readAll(reader array.RecordReader) (stream, error) {
	defer reader.Release()
	all := stream{schema: reader.Schema()}
	for reader.Next() {
		batch := reader.RecordBatch()
		batch.Retain() // the reader lets go of it when it goes on
		all.batches = append(all.batches, batch)
		for column, values := range batch.Columns() {
			if err := validate(values); err != nil {
				return all, fmt.Errorf("column %d: %w", column, err)
			}
		}
	}
	return all, reader.Err()
}

// validate finds, among others, lists of a length so wrong that reading them would take all memory, from which nothing
// recovers. (array.ValidateFull goes through children too, but refuses arrays of nulls and empty ones of unions.)
func validate(values arrow.Array) error {
	if values.Len() == 0 {
		return nil
	}
	if validator, ok := values.(array.Validator); ok {
		if err := validator.ValidateFull(); err != nil {
			return err
		}
	}
	if dictionary, ok := values.(*array.Dictionary); ok {
		return validate(dictionary.Dictionary())
	}
	for _, child := range values.Data().Children() {
		if err := validate(array.MakeFromData(child)); err != nil {
			return err
		}
	}
	return nil
}
