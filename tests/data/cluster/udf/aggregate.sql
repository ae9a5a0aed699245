select l_returnflag, l_linestatus, mysum(cast(l_extendedprice as double)) as price, count(*) as n
from lineitem
group by l_returnflag, l_linestatus
order by l_returnflag, l_linestatus
