select l_orderkey, l_linenumber, l_comment, o_clerk, l_extendedprice, l_shipdate, arrow_cast(o_clerk, 'Binary') as bytes
from lineitem join orders on l_orderkey = o_orderkey
where o_orderkey % 50 = 0
