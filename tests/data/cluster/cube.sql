select o_orderstatus, o_orderpriority, count(distinct o_custkey) as customers, sum(o_totalprice) as total
from orders
group by cube (o_orderstatus, o_orderpriority)
order by o_orderstatus nulls first, o_orderpriority nulls first
