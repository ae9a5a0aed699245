select 'returned' as kind, l_shipmode as mode, count(*) as n, sum(l_quantity) as quantity
from lineitem
where l_returnflag = 'R'
group by l_shipmode
union all
select 'ordered', o_orderpriority, count(*), sum(o_totalprice)
from orders
group by o_orderpriority
union all
select 'stocked', cast(ps_availqty % 5 as varchar), count(*), sum(ps_supplycost)
from partsupp
group by ps_availqty % 5
order by kind, mode
