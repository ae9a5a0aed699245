-- Both inputs of the union are grouped by the same key as what is above it: no shuffle between them.
select key, sum(n) as n, sum(total) as total
from (
  select o_custkey as key, count(*) as n, sum(o_totalprice) as total
  from orders where o_orderstatus = 'F' group by o_custkey
  union all
  select o_custkey as key, count(*) as n, sum(o_totalprice) as total
  from orders where o_orderstatus = 'O' group by o_custkey
)
group by key
order by total desc, key
limit 50
