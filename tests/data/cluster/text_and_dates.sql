select
  case when p_type like '%BRASS' then 'brass' when p_type similar to '%(STEEL|TIN)' then 'hard' else 'other' end as metal,
  regexp_replace(p_container, '^(\w+) .*$', '\1') as size,
  date_part('quarter', l_shipdate) as quarter,
  to_char(min(l_shipdate), '%d.%m.%Y') as first,
  max(l_receiptdate - l_shipdate) as longest,
  count(*) filter (where regexp_like(p_name, '(azure|blue)')) as blue,
  string_agg(distinct upper(substr(p_mfgr, 14)), ',' order by upper(substr(p_mfgr, 14))) as makers
from lineitem join part on l_partkey = p_partkey
where p_size <= 3
group by 1, 2, 3
order by 1, 2, 3
