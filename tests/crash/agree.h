struct asked {
    int least, most;
};
void ask(struct asked *asked);
static inline void note(struct asked *asked, int answer)
{
    asked->least = answer < asked->least ? answer : asked->least;
    asked->most = answer > asked->most ? answer : asked->most;
}
