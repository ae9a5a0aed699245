select n_name, sum(cast(2 * (o_shippriority + o_orderkey) as double)) as keys, max(2 * (c_custkey)) as customer
from orders
join customer on 2 * (o_custkey) = 2 * (c_custkey)
join nation on c_nationkey = n_nationkey
where 2 * (c_custkey) % 10 < 6
group by n_name
having sum(cast(o_totalprice as double)) > 0
order by n_name
