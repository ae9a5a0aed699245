select o_custkey, twice(o_orderkey) as doubled, o_totalprice
from orders
where twice(o_orderkey) % 1000 = 64
order by o_custkey, doubled
