select
  o_orderstatus,
  named_struct('n', count(*), 'most', max(o_totalprice), 'days', named_struct('first', min(o_orderdate))) as summary,
  map(['priorities', 'clerks'], [count(distinct o_orderpriority), count(distinct o_clerk)]) as distincts,
  make_array(min(o_orderkey), null, max(o_orderkey)) as keys
from orders
group by o_orderstatus
order by o_orderstatus
