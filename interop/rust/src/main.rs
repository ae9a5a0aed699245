//! Reads the Flight tickets of a folder, and compares what comes with what was expected.

use std::collections::VecDeque;
use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use arrow_array::array::ListLikeArray;
use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use arrow_array::{Array, ArrayRef, ListArray, RecordBatch, UInt64Array};
use arrow_cast::cast;
use arrow_flight::{FlightClient, Ticket};
use arrow_ipc::reader::StreamReader;
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use arrow_select::take::take;
use futures::TryStreamExt;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// The shape of an array, and its children.
type Parts = (Vec<u64>, Vec<ArrayRef>);

const USAGE: &str = "usage: flight-check URL FOLDER [CA [CERTIFICATE KEY]]

Compares what DoGet sends for every NAME.ticket in FOLDER with the Arrow IPC stream in NAME.arrow.
Where there is a NAME.headers, its lines `name: value` are sent along.
For a URL of grpc+tls://, CA is a PEM file of whom to trust, CERTIFICATE and KEY are shown to it.";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (url, folder, pems) = match arguments.as_slice() {
        [url, folder, pems @ ..] if matches!(pems.len(), 0 | 1 | 3) => (url, folder, pems),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(url, folder.as_ref(), pems).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("flight-check: {error}");
            ExitCode::from(2)
        }
    }
}

async fn run(url: &str, folder: &Path, pems: &[String]) -> Result<bool> {
    let plain = url.replacen("grpc://", "http://", 1);
    let mut endpoint = Endpoint::from_shared(plain.replacen("grpc+tls://", "https://", 1))
        .map_err(|error| format!("{url}: {error}"))?;
    if !pems.is_empty() {
        endpoint = endpoint.tls_config(tls(pems)?)?;
    }
    let cases = cases(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let channel = endpoint.connect_lazy();
    let (mut passed, mut failed) = (0, 0);
    for case in cases {
        let name = case.file_name().unwrap_or_default().display().to_string();
        // In a task of its own, so that a panic in decoding fails this case alone.
        let checked = tokio::spawn(check(channel.clone(), case)).await;
        match checked.unwrap_or_else(|panic| Err(panic.into())) {
            Ok(()) => {
                passed += 1;
                println!("ok {name}");
            }
            Err(reason) => {
                failed += 1;
                // Of several lines: what arrays and remote errors say.
                let reason = reason.to_string();
                let words: Vec<_> = reason.split_whitespace().collect();
                println!("FAIL {name}: {}", words.join(" "));
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

fn tls(pems: &[String]) -> Result<ClientTlsConfig> {
    let read = |path: &String| fs::read(path).map_err(|error| format!("{path}: {error}"));
    let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&pems[0])?));
    if let [_, certificate, key] = pems {
        config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(config)
}

/// The paths of the tickets, without their extension, sorted.
fn cases(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut cases = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension() == Some("ticket".as_ref()) {
            cases.push(path.with_extension(""));
        }
    }
    if cases.is_empty() {
        return Err("no NAME.ticket in here".into());
    }
    cases.sort();
    Ok(cases)
}

async fn check(channel: Channel, case: PathBuf) -> Result<()> {
    let (expected_schema, expected) = read_file(&case.with_added_extension("arrow"))?;
    let (schema, batches) = read_flight(channel, &case).await?;
    check_schema(&schema, &expected_schema)?;
    check_batches(batches, expected)
}

fn read_file(path: &Path) -> Result<(SchemaRef, Vec<RecordBatch>)> {
    let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let reader = StreamReader::try_new_buffered(file, None)?;
    Ok((reader.schema(), reader.collect::<Result<_, _>>()?))
}

async fn read_flight(channel: Channel, case: &Path) -> Result<(SchemaRef, Vec<RecordBatch>)> {
    let mut client = FlightClient::new(channel);
    let headers = case.with_added_extension("headers");
    if headers.try_exists()? {
        for line in fs::read_to_string(headers)?.lines() {
            let (name, value) = line.split_once(':').ok_or("a header has no colon")?;
            let name: AsciiMetadataKey = name.trim().parse()?;
            let value: AsciiMetadataValue = value.trim().parse()?;
            client.metadata_mut().append(name, value);
        }
    }
    let ticket = fs::read(case.with_added_extension("ticket"))?;
    let mut stream = client.do_get(Ticket::new(ticket)).await?;
    let batches = (&mut stream).try_collect().await?;
    let schema = stream.schema().ok_or("no schema came")?;
    Ok((schema.clone(), batches))
}

fn check_schema(schema: &Schema, expected: &Schema) -> Result<()> {
    // Fields count as equal even if only one of two dictionaries is ordered.
    let ordered = |schema: &Schema| {
        let fields = schema.flattened_fields().into_iter();
        fields.map(Field::dict_is_ordered).collect::<Vec<_>>()
    };
    if schema != expected || ordered(schema) != ordered(expected) {
        return Err(format!("{schema:?} came, expected was {expected:?}").into());
    }
    Ok(())
}

/// Compares all rows in their order, wherever one batch ends and the next begins.
fn check_batches(batches: Vec<RecordBatch>, expected: Vec<RecordBatch>) -> Result<()> {
    let rows = |batches: &[RecordBatch]| batches.iter().map(RecordBatch::num_rows).sum::<usize>();
    let (count, expected_count) = (rows(&batches), rows(&expected));
    if count != expected_count {
        return Err(format!("{count} rows came, expected were {expected_count}").into());
    }
    let (mut batches, mut expected) = (VecDeque::from(batches), VecDeque::from(expected));
    let mut row = 0;
    while let (Some(left), Some(right)) = (batches.front(), expected.front()) {
        let rows = left.num_rows().min(right.num_rows());
        check_columns(&left.slice(0, rows), &right.slice(0, rows), row)?;
        skip(&mut batches, rows);
        skip(&mut expected, rows);
        row += rows;
    }
    Ok(())
}

/// Removes rows of the first batch, and with the last of them the batch.
fn skip(batches: &mut VecDeque<RecordBatch>, rows: usize) {
    if let Some(first) = batches.pop_front()
        && first.num_rows() > rows
    {
        batches.push_front(first.slice(rows, first.num_rows() - rows));
    }
}

fn check_columns(batch: &RecordBatch, expected: &RecordBatch, first_row: usize) -> Result<()> {
    for (index, (left, right)) in batch.columns().iter().zip(expected.columns()).enumerate() {
        if same(left, right)? {
            continue;
        }
        let mut rows = (0..left.len()).map(|row| (row, left.slice(row, 1), right.slice(row, 1)));
        let differing = rows.find(|(_, left, right)| !same(left, right).unwrap_or(false));
        let (row, left, right) = differing.ok_or("rows differ, but not alone")?;
        let place = format!("column {index}, row {}", first_row + row);
        return Err(format!("{place}: {left:?} came, expected was {right:?}").into());
    }
    Ok(())
}

/// Whether two arrays of one type stand for the same values, however these are laid out.
///
/// Arrow's own equality sees differences where there is none to see: between NaNs, between a null
/// in a dictionary's keys and one in its values, in what a sparse union does not show.
fn same(left: &dyn Array, right: &dyn Array) -> Result<bool> {
    let (left_rows, right_rows) = (valid_rows(left), valid_rows(right));
    if left.len() != right.len() || left_rows != right_rows {
        return Ok(false);
    }
    // What is behind a null has no meaning.
    let left = take(left, &left_rows, None)?;
    let right = take(right, &right_rows, None)?;
    let (Some(left_parts), Some(right_parts)) = (parts(&left)?, parts(&right)?) else {
        return Ok(left == right);
    };
    let mut equal = left_parts.0 == right_parts.0;
    for (left, right) in left_parts.1.iter().zip(&right_parts.1) {
        equal = equal && same(left, right)?;
    }
    Ok(equal)
}

fn valid_rows(array: &dyn Array) -> UInt64Array {
    // A union has no nulls but those of its members, and it matters which member is null.
    let is_union = matches!(array.data_type(), DataType::Union(..));
    match array.logical_nulls().filter(|_| !is_union) {
        Some(nulls) => UInt64Array::from_iter_values(nulls.valid_indices().map(|row| row as u64)),
        None => UInt64Array::from_iter_values(0..array.len() as u64),
    }
}

/// What an array without nulls consists of, if Arrow cannot compare it: its shape, such as the
/// lengths of lists, and what is in it, in the order of its rows.
fn parts(array: &dyn Array) -> Result<Option<Parts>> {
    Ok(Some(match array.data_type() {
        DataType::Float16 | DataType::Float32 | DataType::Float64 => {
            let reals = cast(array, &DataType::Float64)?;
            let reals = reals.as_primitive::<Float64Type>().values().iter();
            // One NaN is as good as another, and adding zero takes the sign off -0.0.
            let plain = |&real: &f64| if real.is_nan() { f64::NAN } else { real + 0.0 };
            (reals.map(plain).map(f64::to_bits).collect(), vec![])
        }
        DataType::Dictionary(_, values) => (vec![], vec![cast(array, values)?]),
        DataType::RunEndEncoded(_, values) => (vec![], vec![cast(array, values.data_type())?]),
        DataType::Struct(_) => (vec![], array.as_struct().columns().to_vec()),
        DataType::List(_) => list_parts(array.as_list::<i32>())?,
        DataType::LargeList(_) => list_parts(array.as_list::<i64>())?,
        DataType::ListView(_) => list_parts(array.as_list_view::<i32>())?,
        DataType::LargeListView(_) => list_parts(array.as_list_view::<i64>())?,
        DataType::FixedSizeList(..) => list_parts(array.as_fixed_size_list())?,
        DataType::Map(..) => list_parts(&ListArray::from(array.as_map().clone()))?,
        DataType::Union(members, _) => {
            let union = array.as_union();
            let mut children = Vec::with_capacity(members.len());
            for (id, _) in members.iter() {
                let rows = (0..union.len()).filter(|&row| union.type_id(row) == id);
                let places = rows.map(|row| union.value_offset(row) as u64);
                let places = UInt64Array::from_iter_values(places);
                children.push(take(union.child(id), &places, None)?);
            }
            let ids = union.type_ids().iter().map(|&id| id as u64);
            (ids.collect(), children)
        }
        nested if nested.is_nested() => return Err(format!("cannot compare {nested}").into()),
        _ => return Ok(None),
    }))
}

fn list_parts(lists: &impl ListLikeArray) -> Result<Parts> {
    let ranges = (0..lists.len()).map(|row| lists.element_range(row));
    let places = ranges.clone().flatten().map(|place| place as u64);
    let values = take(lists.values(), &UInt64Array::from_iter_values(places), None)?;
    let lengths = ranges.map(|range| range.len() as u64);
    Ok((lengths.collect(), vec![values]))
}
