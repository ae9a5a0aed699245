select l_shipmode, sum(2 * (l_linenumber)) as numbers, count(*) as n
from lineitem
where 2 * (l_suppkey) > 1500
group by l_shipmode
order by l_shipmode
