select
  l_returnflag,
  l_linestatus,
  l_shipmode,
  grouping(l_returnflag) as all_flags,
  grouping(l_shipmode) as all_modes,
  count(*) as n,
  sum(l_extendedprice) as price
from lineitem
group by grouping sets ((l_returnflag, l_linestatus), (l_shipmode), ())
order by l_returnflag nulls last, l_linestatus nulls last, l_shipmode nulls last
