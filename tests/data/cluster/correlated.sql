select p_brand, count(*) as parts, sum(p_retailprice) as price
from part
where p_retailprice > (select avg(other.p_retailprice) from part as other where other.p_brand = part.p_brand)
  and p_size < (select 1 + sum(l_quantity) / 20 from lineitem where l_partkey = p_partkey)
group by p_brand
order by p_brand
