select c_mktsegment, count(*) as customers, sum(c_acctbal) as balance
from customer
where c_custkey in (select o_custkey from orders where o_totalprice > 200000)
  and c_custkey not in (select o_custkey from orders where o_orderstatus = 'P')
  and c_nationkey in (select n_nationkey from nation where n_name like '%A')
group by c_mktsegment
order by c_mktsegment
