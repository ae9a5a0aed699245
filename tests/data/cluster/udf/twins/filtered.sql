select o_custkey, 2 * (o_orderkey) as doubled, o_totalprice
from orders
where 2 * (o_orderkey) % 1000 = 64
order by o_custkey, doubled
