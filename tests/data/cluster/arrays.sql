select
  n_name,
  array_agg(s_name order by s_acctbal desc, s_name) as suppliers,
  array_agg(distinct s_suppkey % 3 order by s_suppkey % 3) as rests,
  cardinality(array_agg(s_suppkey)) as n
from supplier join nation on s_nationkey = n_nationkey
group by n_name
order by n_name
