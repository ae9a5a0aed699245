select
  nation,
  year,
  total,
  total - lag(total, 1, 0) over (partition by nation order by year) as growth,
  ntile(3) over (partition by year order by total, nation) as third,
  first_value(nation) over (partition by year order by total desc, nation) as leader
from (
  select n_name as nation, extract(year from o_orderdate) as year, sum(o_totalprice) as total
  from orders
  join customer on o_custkey = c_custkey
  join nation on c_nationkey = n_nationkey
  group by n_name, extract(year from o_orderdate)
)
order by nation, year
