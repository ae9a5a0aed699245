select r_name, mode, count(*) as n, sum(s_acctbal) as balance
from region
cross join (select distinct l_shipmode as mode from lineitem) modes
cross join supplier
where length(mode) > s_nationkey % 6
group by r_name, mode
order by r_name, mode
