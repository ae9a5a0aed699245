select coalesce(a.day, b.day) as day, a.n as ordered, b.n as shipped
from (select o_orderdate as day, count(*) as n from orders where o_orderdate < date '1992-03-01' group by o_orderdate) a
full outer join (
  select l_shipdate as day, count(*) as n from lineitem where l_shipdate < date '1992-04-01' group by l_shipdate
) b on a.day = b.day
order by day
