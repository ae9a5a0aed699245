select count(*) as n, sum(o_totalprice) as total, max(c_name) as name, array_agg(o_orderkey) as keys
from orders join customer on o_custkey = c_custkey
where o_totalprice < 0
