select n_name, count(c_custkey) as customers, count(o_orderkey) as orders, sum(o_totalprice) as total
from nation
left join customer on c_nationkey = n_nationkey and c_mktsegment = 'MACHINERY'
left join orders on o_custkey = c_custkey and o_orderdate >= date '1998-07-01'
group by n_name
order by n_name
