select
  l_shipmode,
  count(distinct l_suppkey) as suppliers,
  count(distinct l_shipdate) as days,
  sum(distinct l_linenumber) as numbers,
  count(*) filter (where l_quantity > 25) as large,
  bit_xor(l_orderkey) as xor,
  bool_and(l_discount < 0.11) as low
from lineitem
group by l_shipmode
order by l_shipmode
