select
  month,
  n,
  sum(n) over (order by month rows between 2 preceding and current row) as quarter,
  max(n) over (order by month rows between unbounded preceding and unbounded following) as most,
  row_number() over (order by n desc, month) as place
from (select date_trunc('month', l_shipdate) as month, count(*) as n from lineitem group by 1)
order by month
