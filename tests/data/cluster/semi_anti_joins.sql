select 'with' as side, count(*) as n, sum(p_retailprice) as price
from part left semi join lineitem on p_partkey = l_partkey and l_quantity > 49
union all
select 'without', count(*), sum(p_retailprice)
from part left anti join lineitem on p_partkey = l_partkey and l_quantity > 49
union all
select 'bought', count(*), sum(l_extendedprice)
from part right semi join lineitem on p_partkey = l_partkey and p_size = 7
union all
select 'other', count(*), sum(l_extendedprice)
from part right anti join lineitem on p_partkey = l_partkey and p_size = 7
order by side
