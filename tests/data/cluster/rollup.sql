select r_name, n_name, c_mktsegment, count(*) as n, min(c_acctbal) as least, max(c_acctbal) as most
from customer
join nation on c_nationkey = n_nationkey
join region on n_regionkey = r_regionkey
group by rollup (r_name, n_name, c_mktsegment)
order by r_name nulls first, n_name nulls first, c_mktsegment nulls first
