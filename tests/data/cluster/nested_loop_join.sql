select a.n_name, count(*) as n, sum(c_acctbal) as balance, min(s_name) as first
from supplier
join customer on c_acctbal > s_acctbal + 10900
join nation a on a.n_nationkey between s_nationkey and c_nationkey
group by a.n_name
order by a.n_name
