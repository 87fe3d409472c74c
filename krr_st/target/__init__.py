"""The self-supervised target model: `python -m krr_st.target` trains one by Barlow Twins."""
