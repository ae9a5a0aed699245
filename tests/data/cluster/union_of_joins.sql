select source, key, count(*) as n
from (
  select 'customer' as source, o_custkey as key
  from orders join customer on o_custkey = c_custkey
  where c_mktsegment = 'BUILDING'
  union all
  select 'supplier', l_suppkey
  from lineitem join supplier on l_suppkey = s_suppkey
  where s_acctbal < 0
)
group by source, key
having count(*) > 20
order by source, n desc, key
