select o_orderpriority, count(*) as n, sum(o_totalprice) as total
from orders
where o_totalprice > 400000
  or exists (select * from lineitem where l_orderkey = o_orderkey and l_quantity > 49.5)
  or o_custkey in (select c_custkey from customer where c_acctbal > 9900)
group by o_orderpriority
order by o_orderpriority
