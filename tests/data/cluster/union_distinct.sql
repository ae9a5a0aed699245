select l_shipmode as word from lineitem
union
select o_orderpriority from orders
union
select c_mktsegment from customer
union
select n_name from nation
order by word
