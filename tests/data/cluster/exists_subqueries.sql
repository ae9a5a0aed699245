select o_orderpriority, count(*) as n, max(o_totalprice) as most
from orders
where exists (
    select * from lineitem
    where l_orderkey = o_orderkey and l_receiptdate > l_commitdate + interval '60' day
  )
  and not exists (select * from lineitem where l_orderkey = o_orderkey and l_shipmode = 'AIR')
group by o_orderpriority
order by o_orderpriority
