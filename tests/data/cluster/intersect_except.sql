(
  select c_nationkey as nation, c_mktsegment as segment from customer where c_acctbal > 9000
  intersect
  select c_nationkey, c_mktsegment from customer where c_acctbal < -900
)
except
select s_nationkey, 'BUILDING' from supplier where s_acctbal > 5000
order by nation, segment
