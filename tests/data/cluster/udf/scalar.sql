select l_shipmode, sum(twice(l_linenumber)) as numbers, count(*) as n
from lineitem
where twice(l_suppkey) > 1500
group by l_shipmode
order by l_shipmode
