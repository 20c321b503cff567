package page

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	cdppage "github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/performance"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/store"
)

var update = flag.Bool("update", false, "write the screenshots of docs/")

//go:embed testdata/axe.min.js
var axe string

// watched notes long tasks and faults from before the page's own scripts run.
const watched = `
window.long = []; window.faults = [];
new PerformanceObserver((l) => { for (const e of l.getEntries()) long.push(Math.round(e.duration)); }).observe({ type: "longtask", buffered: true });
addEventListener("error", (e) => faults.push(String(e.message)));
addEventListener("unhandledrejection", (e) => faults.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => faults.push("policy: " + e.violatedDirective + " " + e.blockedURI));`

// browser is a Chromium that shows the page.
type browser struct {
	t   *testing.T
	ctx context.Context
}

func newBrowser(t *testing.T) browser {
	t.Helper()
	program := need.Chromium(t)
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(program), chromedp.NoSandbox,
		chromedp.Flag("force-color-profile", "srgb"), chromedp.WindowSize(1280, 860))
	ctx, stop := chromedp.NewExecAllocator(t.Context(), options...)
	t.Cleanup(stop)
	ctx, end := chromedp.NewContext(ctx)
	t.Cleanup(end)
	// it takes 25 s, and three times as long on a machine that is busy
	ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
	t.Cleanup(cancel)
	b := browser{t, ctx}
	call(b, cdppage.AddScriptToEvaluateOnNewDocument, cdppage.AddScriptToEvaluateOnNewDocumentParams{Source: watched})
	return b
}

func (b browser) run(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, steps...); err != nil {
		b.t.Fatal(err)
	}
}

// call sends a command of the protocol.
func call[P, R any](b browser, c cdp.Command[P, R], params P) {
	b.t.Helper()
	if _, err := chromedp.Call(b.ctx, c, params); err != nil {
		b.t.Fatal(err)
	}
}

// press presses keys, one after the other.
func (b browser) press(keys ...string) {
	b.t.Helper()
	for _, k := range keys {
		b.run(chromedp.KeyEvent(k))
	}
}

// do evaluates statements.
func (b browser) do(statements string) {
	b.t.Helper()
	eval[int](b, statements+"\n;0")
}

// eval evaluates an expression, a promise's outcome where it is one.
func eval[T any](b browser, expression string) T {
	b.t.Helper()
	out, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		b.t.Fatalf("%.300s: %v", expression, err)
	}
	return out
}

// until waits for an expression to be true.
func (b browser) until(expression string) {
	b.t.Helper()
	for end := time.Now().Add(30 * time.Second); !eval[bool](b, "Boolean("+expression+")"); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			b.t.Fatalf("%s is not so; faults %v; the page:\n%.2000s", expression, eval[[]string](b, "faults"), eval[string](b, "document.body.innerText"))
		}
	}
}

// accessible has axe look at the page as it is.
func (b browser) accessible(what string) {
	b.t.Helper()
	b.do(axe)
	text := eval[string](b, `axe.run(document, { resultTypes: ["violations"] }).then((r) => JSON.stringify(r.violations.map((v) => ({ id: v.id, help: v.help, nodes: v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200) + " | " + n.failureSummary) }))))`)
	var found []map[string]any
	if err := json.Unmarshal([]byte(text), &found); err != nil {
		b.t.Fatal(err)
	}
	for _, f := range found {
		b.t.Errorf("%s: axe finds %v: %v\n%v", what, f["id"], f["help"], f["nodes"])
	}
}

// picture writes a screenshot of what is seen, where -update says so.
func (b browser) picture(name string) {
	b.t.Helper()
	if !*update {
		return
	}
	b.run(chromedp.Sleep(500 * time.Millisecond)) // what moves has come to rest
	png, err := chromedp.Run(b.ctx, chromedp.CaptureScreenshot())
	if err != nil {
		b.t.Fatal(err)
	}
	if len(png) > 200_000 {
		b.t.Errorf("%s is %d bytes: want 200,000 at most", name, len(png))
	}
	if err := os.WriteFile("../docs/"+name, png, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// pictured is a hash of what the pictures are of, which -update writes with them.
const pictured = "../docs/page.sha256"

func hashOfPage(t *testing.T) string {
	t.Helper()
	h := sha256.New()
	for _, path := range slices.Sorted(maps.Keys(files)) {
		b, err := static.ReadFile(files[path].name)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(h, "%s %d\n%s", path, len(b), b)
	}
	return fmt.Sprintf("%x\n", h.Sum(nil))
}

func TestThePicturesAreOfThisPage(t *testing.T) {
	b, err := os.ReadFile(pictured)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != hashOfPage(t) && !*update {
		t.Error("docs/page-*.png are of an older page: go test ./page -run TestAThousandEgresses -update makes them, where Chromium is")
	}
}

func (b browser) scheme(value string) {
	b.t.Helper()
	call(b, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: value}}})
}

// timed has the page do something in each frame for some seconds.
const timed = `window.timed = (seconds, each) => new Promise((done) => {
  const frames = [], began = performance.now();
  let last = began;
  long.length = 0;
  const step = (now) => {
    frames.push(now - last); last = now;
    // what took long is told a little later
    if (now - began > 1000 * seconds) { setTimeout(() => done({ frames, long: [...long] }), 100); return; }
    each(now - began);
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})`

// scrolling scrolls a table from its head to its end and back. working works, and paints the table, as much in each
// frame: 20 ms on a processor that nobody else has meanwhile.
const (
	scrolling = `(() => {
  const box = document.querySelector("#nodes");
  return timed(4, (ms) => { box.scrollTop = (box.scrollHeight - box.clientHeight) * Math.abs(Math.sin(ms / 900)); });
})()`
	working = `(() => {
  const box = document.querySelector("#nodes");
  const work = (n) => { let sum = 0; for (let i = 0; i < n; i++) sum += Math.sqrt(i); window.sum = sum; };
  let least = Infinity;
  for (let i = 0; i < 10; i++) { const began = performance.now(); work(2e6); least = Math.min(least, performance.now() - began); }
  let odd = false;
  return timed(2, () => { work(2e6 * 20 / Math.max(least, 0.5)); box.style.opacity = (odd = !odd) ? 0.99 : 1; }).then((r) => { box.style.opacity = ""; return r; });
})()`
)

// pace is how long frames, and tasks of 50 ms and more, took, in milliseconds.
type pace struct {
	Frames []float64 `json:"frames"`
	Long   []int     `json:"long"`
}

// stalled is the share of the time that passed in frames of more than 50 ms. Their share of all frames would be small
// also where each takes a second.
func (p pace) stalled() float64 {
	all, slow := 0.0, 0.0
	for _, f := range p.Frames {
		if all += f; f > 50 {
			slow += f
		}
	}
	return slow / all
}

func (p pace) longest() int { return slices.Max(append([]int{0}, p.Long...)) }

// fault says what a person would see, where even is as much work done evenly, and busy how many milliseconds a frame
// had a processor; "": nothing.
func (p pace) fault(even pace, busy float64) string {
	switch most := even.longest() + 250; {
	// The time on a processor is the page's own. Each frame shows other rows. It was 15 to 23 ms on one of two
	// processors that others kept busy, without a graphics card; 50 is what browsers call a long task.
	case busy > 50:
		return fmt.Sprintf("a frame takes %.1f ms of a processor: want 50 at most", busy)
	// Two pictures a second change. Where each took 250 ms, less than all rows do, it would be half of the time.
	case p.stalled() > even.stalled()+0.4:
		return fmt.Sprintf("%.0f %% of the time is in frames above 50 ms, and with even work %.0f %%", 100*p.stalled(), 100*even.stalled())
	case p.longest() > most:
		return fmt.Sprintf("a task takes %d ms: want %d at most", p.longest(), most)
	}
	return ""
}

func TestAStutterIsToldFromABusyMachine(t *testing.T) {
	frames := func(n int, each float64, more ...float64) []float64 {
		return append(slices.Repeat([]float64{each}, n), more...)
	}
	smooth, slow := pace{frames(100, 20), nil}, pace{frames(33, 60), []int{55, 120}}
	for name, tt := range map[string]struct {
		got, even pace
		busy      float64
		want      string
	}{
		"nothing":                        {pace{frames(240, 17), nil}, smooth, 15, ""},
		"a busy machine":                 {pace{frames(60, 66), []int{60, 300}}, slow, 23, ""},
		"all rows at each change":        {pace{frames(20, 20, 450, 450, 450, 450, 450, 450, 450, 450), slices.Repeat([]int{450}, 8)}, smooth, 40, "90 % of the time"},
		"the same, on a busy machine":    {pace{frames(5, 60, 900, 900, 900, 900), slices.Repeat([]int{900}, 4)}, slow, 40, "a task takes 900 ms: want 370 at most"},
		"half of the rows at one change": {pace{frames(200, 17, 400), []int{400}}, smooth, 20, "a task takes 400 ms: want 250 at most"},
		"work in each frame":             {pace{frames(60, 66), nil}, smooth, 60, "a frame takes 60.0 ms"},
	} {
		if got := tt.got.fault(tt.even, tt.busy); !strings.HasPrefix(got, tt.want) || (got == "") != (tt.want == "") {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

func TestAThousandEgressesAndFiveThousandNodesInABrowser(t *testing.T) {
	need.Chromium(t)
	c := newCluster(t, 1000, 5000)
	server := httptest.NewServer(Local(c.page().Handler()))
	t.Cleanup(server.Close) // after the browser, whose connection it waits for
	b := newBrowser(t)
	b.scheme("light")
	b.run(chromedp.EmulateViewport(1280, 900))
	began := time.Now()
	b.run(chromedp.Navigate(server.URL))
	b.until(`document.querySelector("#tab-node .count")?.textContent === "5,000"`)
	t.Logf("all is there after %v; long tasks %v ms", time.Since(began).Round(time.Millisecond), eval[[]int](b, "long"))

	t.Run("what is worst is first, in words too", func(t *testing.T) {
		b := browser{t, b.ctx}
		b.until(`document.querySelector("#wrongTitle").textContent === "What is wrong: 1 broken, 3 degraded"`)
		b.until(`document.querySelector("#egresses tbody tr:not(.space)").innerText.includes("Broken") && document.querySelector("#troubles li").innerText.includes("` + egressName(16) + `")`)
	})
	t.Run("traffic of the egresses that are seen", func(t *testing.T) {
		b := browser{t, b.ctx}
		b.until(`[...document.querySelectorAll("#egresses td.traffic")].some((c) => /sent .*bit\/s, received .*bit\/s$/.test(c.textContent))`)
	})
	b.accessible("light")
	b.picture("page-light.png")

	t.Run("the keyboard is enough", func(t *testing.T) { keyboard(browser{t, b.ctx}) })

	t.Run("dark", func(t *testing.T) {
		b := browser{t, b.ctx}
		b.scheme("dark")
		b.run(chromedp.Navigate(server.URL + "/#/pod/" + strings.ReplaceAll(teams[7]+"/"+egressName(7)+"-00", "/", "%2F")))
		b.until(`document.querySelector(".verdict")?.textContent.includes("through")`)
		b.accessible("dark, a trace")
		b.do("scrollTo(0, 0)")
		b.picture("page-dark.png")
		b.press(kb.Escape)
		b.until(`!document.querySelector("#detail").open`)
		b.accessible("dark")
	})
	t.Run("phone", func(t *testing.T) {
		b := browser{t, b.ctx}
		b.scheme("light")
		b.run(chromedp.EmulateViewport(360, 740, chromedp.EmulateScale(2), chromedp.EmulateMobile), chromedp.Navigate(server.URL))
		b.until(`document.querySelectorAll("#egresses tbody tr").length > 8`)
		if width := eval[int](b, "document.documentElement.scrollWidth"); width > 360 {
			t.Errorf("the page is %d pixels wide on a screen of 360", width)
		}
		b.accessible("phone")
		b.picture("page-phone.png")
		b.run(chromedp.Click("#troubles a"))
		b.until(`document.querySelector("#detailBody dl")`)
		b.until(`/Traffic[^]*sent .* received/.test(document.querySelector("#detailBody").innerText) || document.querySelector("#detailBody").innerText.includes("no node has it")`)
		b.accessible("phone, an egress")
	})
	b.run(chromedp.EmulateViewport(1280, 900), chromedp.Navigate(server.URL))
	t.Run("changes come while it is scrolled", func(t *testing.T) { fluent(browser{t, b.ctx}, c) })
	t.Run("agents that do not answer", func(t *testing.T) {
		b := browser{t, b.ctx}
		c.silent.Store(true)
		b.run(chromedp.Click("#tab-egress"))
		b.until(`[...document.querySelectorAll("#egresses td.traffic")].some((c) => /^not known: the agent of node \S+ is down; it is asked again within 20s$/.test(c.textContent))`)
		b.accessible("agents that do not answer")
		c.silent.Store(false)
	})
	t.Run("texts of others stay text", func(t *testing.T) { hostile(browser{t, b.ctx}, c) })
	if *update && !t.Failed() {
		if err := os.WriteFile(pictured, []byte(hashOfPage(t)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Access ends each stream after a while, and the browser opens another one: a screen reader need not read that out.
func TestAConnectionThatIsBackAtOnceIsNotToldToBeLost(t *testing.T) {
	need.Chromium(t)
	h := newCluster(t, 3, 5).page().Handler()
	var down atomic.Bool
	var ended atomic.Int64
	server := httptest.NewServer(Local(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/events" {
			if down.Load() {
				http.Error(w, "down", http.StatusServiceUnavailable)
				return
			}
			ctx, cancel := context.WithTimeout(r.Context(), time.Second)
			defer cancel()
			defer ended.Add(1)
			r = r.WithContext(ctx)
		}
		h.ServeHTTP(w, r)
	})))
	t.Cleanup(server.Close) // after the browser, whose connection it waits for
	b := newBrowser(t)
	b.run(chromedp.Navigate(server.URL))
	text := `document.querySelector("#linkText").textContent`
	b.until(text + ` === "live"`)
	b.do(`window.heard = [];
new MutationObserver(() => heard.push(` + text + `)).observe(document.querySelector("#link"), { childList: true, characterData: true, subtree: true })`)
	until(t, func() bool { return ended.Load() >= 5 })
	if heard := eval[[]string](b, "heard"); len(heard) > 0 {
		t.Errorf("while streams ended and others began, the page said %q", heard)
	}
	down.Store(true)
	b.until(text + `.startsWith("connection lost")`)
	down.Store(false)
	b.until(text + ` === "live"`)
}

// By the keyboard alone; the address of the page is the whole question, as it is sent to others.
func TestATraceIsAskedForByWhatAPodSends(t *testing.T) {
	need.Chromium(t)
	server := httptest.NewServer(Local(newCluster(t, 3, 5).page().Handler()))
	t.Cleanup(server.Close) // after the browser, whose connection it waits for
	b := newBrowser(t)
	plain := server.URL + "/#/pod/" + strings.ReplaceAll(teams[2]+"/"+egressName(2)+"-00", "/", "%2F")
	b.run(chromedp.EmulateViewport(1280, 900), chromedp.Navigate(plain))
	b.until(`document.querySelector(".verdict")?.textContent.includes("through")`)
	b.run(chromedp.Focus("#to"))
	b.press("198.51.100.9", kb.Tab, "udp", kb.Tab, "53", kb.Enter)
	b.until(`document.querySelector(".steps")?.innerText.includes("198.51.100.9 port 53 (udp) is outside")`)
	b.until(`document.activeElement.textContent === "Trace"`)
	b.accessible("a trace of what a pod sends")
	b.run(chromedp.Reload())
	b.until(`document.querySelector(".steps")?.innerText.includes("198.51.100.9 port 53 (udp) is outside")`)
	b.until(`document.querySelector("#port").value === "53" && document.querySelector("#protocol").value === "udp"`)
	b.do(`document.querySelector("#to").focus(); document.querySelector("#to").select()`)
	b.press(kb.Backspace, kb.Enter)
	b.until(`document.querySelector("#detailBody [role=alert]")?.textContent === "port 53: want the address that it is a port of"`)
	b.accessible("a question that is refused")
	b.run(chromedp.EmulateViewport(360, 740, chromedp.EmulateScale(2), chromedp.EmulateMobile))
	if width := eval[int](b, `document.querySelector("#detail").scrollWidth - document.querySelector("#detail").clientWidth`); width > 0 {
		t.Errorf("the trace is %d pixels wider than a phone", width)
	}
	b.do(`location.hash = "#/pod/" + encodeURIComponent("no/such") + "?to=198.51.100.9&protocol=" + encodeURIComponent('"><img src=x onerror=faults.push(1)>')`)
	b.until(`document.querySelector("#detailBody [role=alert]")?.textContent.includes('want tcp, udp')`)
	if faults := eval[[]string](b, "faults"); len(faults) > 0 || eval[int](b, `document.querySelectorAll("dialog img").length`) > 0 {
		t.Errorf("the page had faults: %v", faults)
	}
}

// keyboard goes by the keyboard alone from a search to a trace, and through the tables.
func keyboard(b browser) {
	focus := func(want string) {
		b.t.Helper()
		b.until(fmt.Sprintf("(document.activeElement.id || document.activeElement.textContent).includes(%q)", want))
	}
	b.press("/")
	focus("q")
	b.do(`document.querySelector("#q").value = ""`) // a key that is made here is typed, too, although the page has dealt with it
	b.press("checkout-4-1")
	b.until(`document.querySelectorAll("#hits a").length >= 2`)
	b.accessible("results of a search")
	b.press(kb.ArrowDown, kb.ArrowDown, kb.ArrowUp, kb.Enter)
	b.until(`document.querySelector("#detail").open && document.querySelector(".verdict")?.textContent.includes("checkout") === false`)
	focus("detailTitle")
	b.until(`document.activeElement.textContent === "Pod checkout/checkout-4-10"`)
	b.press(kb.Tab)
	focus("close")
	b.press(kb.Enter)
	b.until(`!document.querySelector("#detail").open && location.hash === ""`)

	b.run(chromedp.Focus("#tab-egress"))
	b.press(kb.ArrowRight)
	focus("tab-node")
	b.until(`document.querySelectorAll("#nodes tbody tr:not(.space)").length > 5`)
	b.press(kb.Tab)
	focus("filter")
	b.press("node-123")
	b.until(`document.querySelector("#nodes table").getAttribute("aria-rowcount") === "12"`) // node-123, node-1230 to 1239, and the head
	// the table, and the first head
	b.press("4", kb.Tab, kb.Tab, kb.Enter)
	b.until(`document.querySelector("#nodes th").getAttribute("aria-sort") === "ascending"`)
	b.run(chromedp.Focus("#nodes tbody a"))
	b.press(kb.Enter)
	b.until(`document.querySelector("#detail").open && document.querySelector("#detailBody").innerText.includes("index 1234")`)
	b.accessible("a node")
	b.press(kb.Escape)
	b.until(`!document.querySelector("#detail").open`)
	b.do(`document.querySelector("#filter").value = ""; document.querySelector("#filter").dispatchEvent(new Event("input"))`)
}

// busy returns for how long the page's main thread has been on a processor, in milliseconds.
func (b browser) busy() float64 {
	b.t.Helper()
	got, err := chromedp.Call(b.ctx, performance.GetMetrics, cdp.Empty{})
	if err != nil {
		b.t.Fatal(err)
	}
	for _, m := range got.Metrics {
		if m.Name == "TaskDuration" {
			return 1000 * m.Value
		}
	}
	b.t.Fatal("the browser does not say for how long it was busy")
	return 0
}

// fluent scrolls 5,000 rows while 20 changes a second come. What else the machine does may be in the way once.
func fluent(b browser, c *cluster) {
	b.until(`document.querySelector("#nodes") !== null`)
	b.run(chromedp.Click("#tab-node"))
	b.until(`document.querySelectorAll("#nodes tbody tr:not(.space)").length > 5`)
	b.do(timed)
	call(b, performance.Enable, performance.EnableParams{TimeDomain: performance.EnableTimeDomainThreadTicks})
	fault := ""
	for range 3 {
		if fault = stutters(b, c); fault == "" {
			break
		}
		b.t.Log(fault)
	}
	if fault != "" {
		b.t.Error(fault)
	}
	if rows := eval[int](b, `document.querySelectorAll("tbody tr").length`); rows > 200 {
		b.t.Errorf("%d rows are in the document, of which some 40 are seen", rows)
	}
	b.until(`document.querySelector("#tab-move .count").textContent === "200"`)
}

// changing makes 20 changes a second until it is ended, and then returns how many.
func changing(c *cluster) (end func() int) {
	stop, stopped := make(chan struct{}), make(chan int)
	go func() {
		n, began := 0, time.Now()
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				// where etcd is slow, several at a time
				for due := min(int(time.Since(began)/(50*time.Millisecond)), n+50); n < due; n++ {
					c.change()
				}
				c.flush()
			case <-stop:
				stopped <- n
				return
			}
		}
	}()
	return func() int { close(stop); return <-stopped }
}

// stutters scrolls once, and returns what a person would see of it; "": nothing. How long a frame takes is also up to
// what else the machine does, so the measure is the same page when it is not scrolled, with no changes and as much to
// do in each frame.
func stutters(b browser, c *cluster) string {
	b.run(chromedp.Sleep(time.Second)) // the last changes of before are drawn
	even := eval[pace](b, working)
	end := changing(c)
	before := b.busy()
	got := eval[pace](b, scrolling)
	busy := (b.busy() - before) / float64(len(got.Frames))
	n := end()
	frames := slices.Sorted(slices.Values(got.Frames))
	at := func(share float64) float64 { return frames[int(share*float64(len(frames)-1))] }
	b.t.Logf("%d changes while 5,000 rows were scrolled: %.1f ms of a processor for each of %d frames; median %.0f ms, 95 %% within %.0f ms, the longest %.0f ms; "+
		"%.0f %% of the time in frames above 50 ms, long tasks %v ms; with even work %.0f %%, and %v ms",
		n, busy, len(frames), at(0.5), at(0.95), at(1), 100*got.stalled(), got.Long, 100*even.stalled(), even.Long)
	return got.fault(even, busy)
}

// hostile has names and texts that would be HTML, or a script, if they were not text.
func hostile(b browser, c *cluster) {
	const evil = `<img src=x onerror="faults.push('xss')">`
	pods := []egress.Member{{Pod: "evil/" + evil, IPs: []netip.Addr{netip.MustParseAddr("10.244.9.9")}}}
	c.put(store.MembersByEgressKey(egressName(1), "node-9"), egress.Members{Egress: egressName(1), Node: "node-9", Pods: pods})
	c.agent(8, map[string]string{evil: `</script><script>faults.push("xss")</script>`})
	c.flush()
	b.until(`document.querySelector("#troubles").innerText.includes("</script><script>")`)
	b.do(`location.hash = "#/pod/" + encodeURIComponent("evil/" + ` + "`" + evil + "`" + `)`)
	b.until(`document.querySelector("#detailTitle").textContent.includes("<img") && document.querySelector(".steps")`)
	b.do(`location.hash = "#/egress/` + egressName(1) + `"`)
	b.until(`document.querySelector(".pods")?.innerText.includes("<img")`)
	b.do(`location.hash = "#/egress/"+encodeURIComponent("javascript:faults.push(1)")`)
	b.until(`document.querySelector("#detailBody").innerText.includes("there is no egress")`)
	if n := eval[int](b, `document.querySelectorAll("main img, dialog img, main script").length`); n > 0 {
		b.t.Errorf("%d elements came from texts of others", n)
	}
	if refused := eval[string](b, `try { document.body.innerHTML = "<b>x</b>"; "done" } catch (e) { e.name }`); refused != "TypeError" {
		b.t.Errorf("HTML from text: %s, want that the browser refuses it", refused)
	}
	b.do(`faults = faults.filter((f) => !f.startsWith("policy: require-trusted-types")); document.querySelector("#close").click()`) // our own attempt
	if faults := eval[[]string](b, "faults"); len(faults) > 0 {
		b.t.Errorf("the page had faults: %v", faults)
	}
}
