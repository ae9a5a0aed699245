//! Plans SQL over Parquet files, runs it on workers of Distributed DataFusion, and prints the rows.

use std::error::Error;
use std::process;
use std::sync::Arc;

use clap::Parser;
use datafusion::arrow::datatypes::DataType;
use datafusion::arrow::util::pretty::pretty_format_batches_with_schema;
use datafusion::common::exec_err;
use datafusion::error::DataFusionError;
use datafusion::execution::SessionStateBuilder;
use datafusion::logical_expr::function::AccumulatorArgs;
use datafusion::logical_expr::{
    AggregateUDF, ColumnarValue, ScalarUDF, Volatility, create_udaf, create_udf,
};
use datafusion::physical_plan::ExecutionPlanProperties;
use datafusion::prelude::{ParquetReadOptions, SessionContext};
use datafusion_distributed::{
    DesiredTaskCountEvent, DesiredTaskCountEventResponse, DistributedExt, SessionStateBuilderExt,
    WorkerResolver,
};
use http::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Without these, small files are read here and no worker is asked, which is not what somebody
/// wants who tries workers.
const DIVIDE_SMALL_FILES: [(&str, &str); 3] = [
    ("datafusion.execution.collect_statistics", "false"),
    ("datafusion.optimizer.repartition_file_min_size", "0"),
    ("distributed.file_scan_config_bytes_per_partition", "1"),
];

/// Plans SQL over Parquet files, runs it on workers of Distributed DataFusion, and prints the rows.
#[derive(Parser)]
struct Options {
    /// A query; `EXPLAIN ANALYZE` before it shows what the nodes of its plan did, and where
    sql: String,

    /// A worker, such as http://127.0.0.1:8000; at least two are needed
    #[arg(long = "worker", value_name = "URL", required = true)]
    workers: Vec<Url>,

    /// A Parquet file, or a folder of some, which all workers have under the same path
    #[arg(long = "table", value_name = "NAME=PATH", value_parser = pair)]
    tables: Vec<(String, String)>,

    /// A header of every request, also of those that workers make to each other
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(HeaderName, HeaderValue)>,

    /// A scalar function of the workers, with Arrow's types
    #[arg(long = "scalar", value_name = "NAME(TYPE, ...) -> TYPE", value_parser = scalar)]
    scalars: Vec<ScalarUDF>,

    /// An aggregate function of the workers: what it takes, keeps as its state, and returns
    #[arg(long = "aggregate", value_name = "NAME(TYPE, ...) -> (TYPE, ...) -> TYPE", value_parser = aggregate)]
    aggregates: Vec<AggregateUDF>,

    /// A setting of DataFusion or of its distribution, such as distributed.compression=zstd
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = pair)]
    settings: Vec<(String, String)>,
}

struct Workers(Vec<Url>);

impl WorkerResolver for Workers {
    fn get_urls(&self) -> Result<Vec<Url>, DataFusionError> {
        Ok(self.0.clone())
    }
}

/// Has a scan of one partition executed by one task. DataFusion left it whole for what is above,
/// such as a limit or a row number; `datafusion-distributed` would divide it among tasks all the
/// same, each of which then has a limit and row numbers of its own.
fn keep_whole(
    event: DesiredTaskCountEvent,
) -> Option<Result<DesiredTaskCountEventResponse, DataFusionError>> {
    let partitions = event.plan.output_partitioning().partition_count();
    let whole = event.plan.children().is_empty() && partitions == 1;
    whole.then(|| Ok(DesiredTaskCountEventResponse::maximum(1)))
}

#[tokio::main]
async fn main() {
    match run(Options::parse()).await {
        Ok(rows) => println!("{rows}"),
        Err(error) => {
            eprintln!("coordinator: {error}");
            // Returning would cancel what still runs of the query, which panics about that.
            process::exit(1);
        }
    }
}

async fn run(options: Options) -> Result<String> {
    let mut builder = SessionStateBuilder::new()
        .with_default_features()
        .with_distributed_worker_resolver(Workers(options.workers))
        .with_distributed_passthrough_headers(HeaderMap::from_iter(options.headers))?
        .with_distributed_desired_task_count_handler(keep_whole)
        .with_distributed_planner();
    let config = builder.config().get_or_insert_default().options_mut();
    for (name, value) in DIVIDE_SMALL_FILES {
        config.set(name, value)?;
    }
    for (name, value) in &options.settings {
        config.set(name, value)?;
    }
    let session = SessionContext::new_with_state(builder.build());
    for function in options.scalars {
        session.register_udf(function);
    }
    for function in options.aggregates {
        session.register_udaf(function);
    }
    for (name, path) in options.tables {
        let options = ParquetReadOptions::default();
        session.register_parquet(name, path, options).await?;
    }
    let query = session.sql(&options.sql).await?;
    let schema = Arc::clone(query.schema().inner());
    let batches = query.collect().await?;
    Ok(pretty_format_batches_with_schema(schema, &batches)?.to_string())
}

fn pair(text: &str) -> Result<(String, String)> {
    let (name, value) = text.split_once('=').ok_or("there is no =")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue)> {
    let (name, value) = pair(text)?;
    Ok((name.parse()?, value.parse()?))
}

fn scalar(text: &str) -> Result<ScalarUDF> {
    let (signature, output) = text.split_once("->").ok_or("there is no ->")?;
    let (name, inputs) = name_and_types(signature)?;
    let output = output.trim().parse()?;
    let unknown = unknown_here(&name);
    let call = Arc::new(move |_: &[ColumnarValue]| exec_err!("{unknown}"));
    Ok(create_udf(
        &name,
        inputs,
        output,
        Volatility::Immutable,
        call,
    ))
}

fn aggregate(text: &str) -> Result<AggregateUDF> {
    let parts: Vec<_> = text.split("->").collect();
    let [signature, state, output] = parts[..] else {
        return Err("there are not two ->".into());
    };
    let (name, inputs) = name_and_types(signature)?;
    let (_, state) = name_and_types(state)?;
    let output = Arc::new(output.trim().parse()?);
    let unknown = unknown_here(&name);
    let accumulator = Arc::new(move |_: AccumulatorArgs<'_>| exec_err!("{unknown}"));
    Ok(create_udaf(
        &name,
        inputs,
        output,
        Volatility::Immutable,
        accumulator,
        Arc::new(state),
    ))
}

fn unknown_here(name: &str) -> String {
    format!("only workers can call {name}, and the plan has it called by the coordinator")
}

/// The parts of `name(Int64, Decimal128(15, 2))`.
fn name_and_types(text: &str) -> Result<(String, Vec<DataType>)> {
    let (name, inner) = text.trim().split_once('(').ok_or("there is no (")?;
    let inner = inner.strip_suffix(')').ok_or("there is no )")?;
    let mut types = Vec::new();
    let mut start = 0;
    // A comma that does not end a type is within one.
    for (end, _) in inner.match_indices(',').chain([(inner.len(), "")]) {
        if let Ok(found) = inner[start..end].trim().parse() {
            types.push(found);
            start = end + 1;
        }
    }
    match inner.get(start..).unwrap_or_default().trim() {
        "" => Ok((name.to_owned(), types)),
        rest => Err(format!("not types: {rest}").into()),
    }
}
