select l_orderkey, l_linenumber, l_extendedprice, p_name, s_name
from lineitem
join part on l_partkey = p_partkey
join supplier on l_suppkey = s_suppkey
order by l_extendedprice desc, l_orderkey, l_linenumber
limit 20 offset 5
