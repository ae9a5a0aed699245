select line['mode'] as mode, line['number'] as number, count(*) as n, sum(line['price']) as price
from (
  select l_orderkey, unnest(lines) as line
  from (
    select
      l_orderkey,
      array_agg(named_struct('mode', l_shipmode, 'number', l_linenumber, 'price', l_extendedprice)) as lines
    from lineitem
    group by l_orderkey
  )
  where cardinality(lines) >= 5
)
group by line['mode'], line['number']
order by mode, number
