with recent as (
  select o_custkey, o_orderkey, o_totalprice from orders where o_orderdate >= date '1998-01-01'
),
spent as (
  select o_custkey, sum(o_totalprice) as total, count(*) as n from recent group by o_custkey
),
mean as (
  select avg(total) as total from spent
)
select c_name, spent.total, spent.n, count(l_orderkey) as lines
from spent
join customer on c_custkey = spent.o_custkey
join recent on recent.o_custkey = spent.o_custkey
join lineitem on l_orderkey = recent.o_orderkey
where spent.total > 4 * (select total from mean)
group by c_name, spent.total, spent.n
order by spent.total desc, c_name
