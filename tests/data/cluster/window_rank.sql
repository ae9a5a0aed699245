select *
from (
  select
    o_custkey,
    o_orderkey,
    o_totalprice,
    rank() over (partition by o_custkey order by o_totalprice desc, o_orderkey) as place,
    sum(o_totalprice) over (partition by o_custkey order by o_orderdate, o_orderkey) as so_far,
    lag(o_orderdate) over (partition by o_custkey order by o_orderdate, o_orderkey) as before,
    count(*) over (partition by o_custkey) as orders
  from orders
)
where place <= 2 and orders > 25
order by o_custkey, place
