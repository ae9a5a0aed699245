select
  l_returnflag,
  avg(cast(l_quantity as double)) as mean,
  stddev(cast(l_extendedprice as double)) as deviation,
  var_pop(cast(l_discount as double)) as variance,
  corr(cast(l_quantity as double), cast(l_extendedprice as double)) as correlation,
  median(l_quantity) as middle,
  regr_slope(cast(l_tax as double), cast(l_discount as double)) as slope
from lineitem
group by l_returnflag
order by l_returnflag
