select l_shipmode, o_orderpriority, count(*) as n, array_agg(o_comment) as comments
from lineitem join orders on l_orderkey = o_orderkey
where l_quantity > 1000
group by l_shipmode, o_orderpriority
order by l_shipmode, o_orderpriority
