select n_name, mysum(cast(twice(o_shippriority + o_orderkey) as double)) as keys, max(twice(c_custkey)) as customer
from orders
join customer on twice(o_custkey) = twice(c_custkey)
join nation on c_nationkey = n_nationkey
where twice(c_custkey) % 10 < 6
group by n_name
having mysum(cast(o_totalprice as double)) > 0
order by n_name
