// Cards to choose one of: a click (or Enter, since they are buttons) says which.
element.addEventListener('click', (event) => {
  const card = event.target.closest('[data-name]');
  if (card) trigger('picked', { name: card.dataset.name });
});
