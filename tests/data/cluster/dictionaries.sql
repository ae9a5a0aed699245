select mode, priority, flag, count(*) as n, sum(l_tax) as tax
from (
  select
    l_tax,
    arrow_cast(l_shipmode, 'Dictionary(Int32, Utf8)') as mode,
    arrow_cast(o_orderpriority, 'Dictionary(UInt8, Utf8)') as priority,
    arrow_cast(l_returnflag, 'LargeUtf8') as flag
  from lineitem join orders on l_orderkey = o_orderkey
)
group by mode, priority, flag
order by mode, priority, flag
