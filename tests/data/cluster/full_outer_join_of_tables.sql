select c_custkey is null as no_customer, s_suppkey is null as no_supplier, count(*) as n, sum(c_acctbal - s_acctbal) as d
from customer full outer join supplier on c_custkey = s_suppkey + 14500 and c_acctbal > s_acctbal
group by 1, 2
order by 1, 2
