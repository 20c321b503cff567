package kubelet

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const readme = "../README.md" // from docs

// pages have commands that the steps or other tests run, or that are marked as not run.
var pages = []string{
	"install.md", "aws.md", "multitenancy.md", "security.md", readme, "natlog.md", "ports.md", "troubleshooting.md", "failover.md", "datapath.md",
	"scale.md", "faults.md", "ownership.md",
}

var (
	remark = regexp.MustCompile(`\s\s+#.*`)
	// placeholder is what a user writes something else for, as a variable of the shell or by hand.
	placeholder = regexp.MustCompile(`\$?\b[A-Z]{3,}\b`)
	// marked is how a paragraph ends whose commands, in the block after it, are not run.
	marked = regexp.MustCompile(`\*\(not run[^()]*\)\*:$`)
	// file is how a block begins that is one, or what something prints; variable a line that sets what the next ones use.
	file     = regexp.MustCompile(`^(\{|\w+: |== )`)
	variable = regexp.MustCompile(`^[A-Z]+=`)
	asked    = regexp.MustCompile(`documented\(t, "([^"]+)", "([^"]+)"`)
)

// example is how the paragraph before a block begins that cmd/egret's TestTroubleshooting runs.
const example = "<!-- example: "

// command is one of a page.
type command struct {
	section string // empty: before the first one
	text    string // in one line, where it has no line breaks of its own
	notRun  bool   // the page says so: of the page, the section, the block or the command
}

// commands returns those of the indented and fenced blocks of a page.
func commands(page string) ([]command, error) {
	b, err := os.ReadFile("../../docs/" + page)
	if err != nil {
		return nil, err
	}
	var all []command
	var none bool // of the page is run
	for i, text := range strings.Split(string(b), "\n## ") {
		section := ""
		if i > 0 {
			section, text, _ = strings.Cut(text, "\n")
		} else {
			none = strings.Contains(text, "**None of this has been run")
		}
		paragraphs := strings.Split(strings.Trim(text, "\n"), "\n\n")
		none := none || strings.HasPrefix(paragraphs[0], "*(not run")
		before := ""
		for _, p := range paragraphs {
			inner, fenced := strings.CutPrefix(p, "```\n")
			if fenced {
				p = strings.TrimSuffix(inner, "\n```")
			}
			if !fenced && !strings.HasPrefix(p, "    ") {
				before = strings.Join(strings.Fields(p), " ")
				continue
			}
			if strings.HasPrefix(before, example) {
				continue
			}
			for _, c := range block(p) {
				c.section, c.notRun = section, c.notRun || none || marked.MatchString(before)
				all = append(all, c)
			}
		}
	}
	return all, nil
}

// block returns the commands of an indented block.
func block(text string) []command {
	if file.MatchString(strings.TrimSpace(text)) {
		return nil
	}
	var all []command
	var c command
	prompt := strings.HasPrefix(strings.TrimSpace(text), "$ ")
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		c.notRun = c.notRun || strings.Contains(remark.FindString(line), "not run")
		line = remark.ReplaceAllString(line, "")
		if prompt && !strings.HasPrefix(line, "$ ") {
			continue // what the command before printed
		}
		line = strings.TrimPrefix(line, "$ ")
		if goesOn := strings.TrimSuffix(line, `\`); goesOn != line {
			c.text += goesOn
			continue
		}
		c.text += line
		if strings.Count(c.text, "'")%2 == 1 || strings.HasSuffix(line, "|") || strings.HasPrefix(c.text, "for ") && line != "done" {
			c.text += "\n"
			continue
		}
		if !variable.MatchString(c.text) {
			all = append(all, c)
		}
		c = command{}
	}
	return all
}

// find returns the one that is begins, or else the one of a section that begins so.
func find(all []command, section, begins string) (int, error) {
	found, n := -1, 0
	for i, c := range all {
		if c.section != section || !strings.HasPrefix(c.text, begins) {
			continue
		}
		if c.text == begins {
			return i, nil
		}
		found = i
		n++
	}
	if n != 1 {
		return 0, fmt.Errorf("docs/install.md, %s: %d commands begin with %q, want one", section, n, begins)
	}
	return found, nil
}

// documented returns the words of a command of docs/install.md, as a shell reads them. What the user is to write in place
// of a word in capitals is in with, as is what a step has elsewhere; folders of the repository are named by their paths.
func documented(t *testing.T, section, begins string, with map[string]string) []string {
	t.Helper()
	all, err := commands("install.md")
	if err != nil {
		t.Fatal(err)
	}
	i, err := find(all, section, begins)
	if err != nil {
		t.Fatal(err)
	}
	var pairs []string
	for from, to := range with {
		pairs = append(pairs, "$"+from, to, from, to)
	}
	for _, name := range placeholder.FindAllString(all[i].text, -1) {
		if _, ok := with[strings.TrimPrefix(name, "$")]; !ok {
			t.Fatalf("docs/install.md, %s: %q: what is %s?", section, all[i].text, name)
		}
	}
	line := strings.NewReplacer(pairs...).Replace(all[i].text)
	out, err := exec.CommandContext(t.Context(), "bash", "-fc", `printf '%s\0' `+line).Output()
	if err != nil {
		t.Fatalf("the words of %s: %v", line, err)
	}
	words := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
	for i, w := range words {
		if strings.HasPrefix(w, "charts/") || strings.HasPrefix(w, "manifests/") {
			if words[i], err = filepath.Abs("../../" + w); err != nil {
				t.Fatal(err)
			}
		}
	}
	return words
}

// elsewhere has what runs a command of the pages that no step does by its words on the page: a file and what it has.
var elsewhere = map[string]struct{ file, has string }{
	"make image REPOSITORY=$REPOSITORY": {"../../Makefile", "$(MAKE) image REPOSITORY=$(REPOSITORY)\n"}, // test-kubelet

	"make demo":                               {"../../.ci/run", "make demo\n"},
	"make test":                               {"../../.ci/run", "make test\n"},
	"kubectl apply -f manifests/examples":     {"steps_test.go", `kubectl("apply", "-f", c.file("../../manifests/examples"))`},
	"kubectl get egress -o wide":              {"steps_test.go", `kubectl("get", "egress", "-o", "wide")`},
	"kubectl describe egress egress-prod-web": {"steps_test.go", `kubectl("describe", "egress", "egress-prod-web")`},
	"egret move IP --to NODE [--pin]":         {"../drain_test.go", `egret(t, "move", ip.String(), "--to", gateway, "--pin")`},
	"egret drain NODE --wait":                 {"../drain_test.go", `egret(t, "drain", gateway, "--wait", "--timeout", "20s")`},

	"egret agent --nat-log /var/log/egret/nat.log":                                  {"../who_test.go", `exec %s \"$@\" --nat-log %s`},
	"egret who IP:PORT [--at TIME] [--to ADDRESS] [--protocol NAME] [-o json|yaml]": {"../who_test.go", `"who", "--endpoints"`},
	"egret who 10.10.0.95:2976":                                                     {"../who_test.go", `n.remote("who", "10.10.0.95")`},
	"egret get blocks 10.10.0.11":                                                   {"../ports_test.go", `"get", "blocks", ip.String()`},
	"make test-faults":                                                              {"../../Makefile", "test-integration test-faults\n"},
	"go test ./ownership -run TestSchedules -schedules-time 3m":                     {"../../Makefile", "./ownership -run 'TestSchedules$$' -schedules-time"},
	"go test ./ownership -run TestInteractions":                                     {"../../ownership/interaction_test.go", "func TestInteractions("},
	"make build kube":                                                               {"../../Makefile", "test-integration-rest: build kube\n"},
}

// runElsewhere reports whether another test runs a command. Those of egret-lab in the README are run as they are there.
func runElsewhere(page, text string) (bool, error) {
	by, ok := elsewhere[text]
	switch {
	case page == readme && strings.HasPrefix(text, "bin/egret-lab "):
		by.file, by.has = "../lab/readme_test.go", "func TestTheCommandsOfTheREADMEMakeALab("
	case page == readme && strings.HasPrefix(text, "helm install "):
		by.file, by.has = "docs_test.go", "func TestTheREADMEInstallsAsThePageDoes("
	case !ok:
		return false, nil
	}
	b, err := os.ReadFile(by.file)
	return strings.Contains(string(b), by.has), err
}

// The pages' first sentence says so.
func TestEveryCommandOfThePagesIsRunOrMarkedAsNotRun(t *testing.T) {
	sources, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var calls [][]string
	for _, source := range sources {
		b, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		calls = append(calls, asked.FindAllStringSubmatch(string(b), -1)...)
	}
	for _, page := range pages {
		all, err := commands(page)
		if err != nil {
			t.Fatal(err)
		}
		run := make([]bool, len(all))
		if page == "install.md" {
			for _, call := range calls {
				i, err := find(all, call[1], call[2])
				if err != nil {
					t.Error(err)
					continue
				}
				run[i] = true
			}
		}
		for i, c := range all {
			if !run[i] {
				if run[i], err = runElsewhere(page, c.text); err != nil {
					t.Error(err)
				}
			}
			switch {
			case run[i] && c.notRun:
				t.Errorf("docs/%s, %s: %q is run, and marked as not run", page, c.section, c.text)
			case !run[i] && !c.notRun:
				t.Errorf("docs/%s, %s: %q is neither run nor marked as not run", page, c.section, c.text)
			}
		}
		t.Logf("docs/%s: %d commands", page, len(all))
	}
}

// The README has the page's first way to install.
func TestTheREADMEInstallsAsThePageDoes(t *testing.T) {
	own, err := commands(readme)
	if err != nil {
		t.Fatal(err)
	}
	page, err := commands("install.md")
	if err != nil {
		t.Fatal(err)
	}
	i, err := find(page, "Quick", "helm install")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(own, func(c command) bool { return c.section == "Use it" && c.text == page[i].text }) {
		t.Errorf("README, Use it, lacks %q", page[i].text)
	}
}

func TestCommandsAreThoseOfThePage(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	const own = "An etcd of its own"
	for _, tt := range []struct {
		section, begins string
		with            map[string]string
		want            string
	}{
		{"Quick", "helm install", map[string]string{"REPOSITORY": "registry:5000/egret", "TAG": "1"},
			"helm install egret ROOT/charts/egret -n egret-system --create-namespace -f ROOT/manifests/examples/values/bundled-etcd.yaml " +
				"--set image.repository=registry:5000/egret --set-string image.tag=1"},
		{"Chart", "helm install", map[string]string{"VALUES": "/v.yaml"}, "helm install egret ROOT/charts/egret -n egret-system -f /v.yaml"},
		{"Your own etcd", "kubectl -n egret-system create secret generic egret-etcd-agent", map[string]string{"ca.crt": "/a/ca.crt", "tls.crt": "/a/tls.crt", "tls.key": "/a/tls.key"},
			"kubectl -n egret-system create secret generic egret-etcd-agent --from-file=/a/ca.crt --from-file=/a/tls.crt --from-file=/a/tls.key"},
		{"Your own etcd", "egret etcd-rbac", map[string]string{"~/.kube/config": "/k", "ca.crt": "/r/ca.crt", "root.crt": "/r/tls.crt", "root.key": "/r/tls.key"},
			"egret etcd-rbac --apply --enable --kubeconfig /k --cacert /r/ca.crt --cert /r/tls.crt --key /r/tls.key"},
		{own, "kubectl -n egret-system create job", map[string]string{"JOB": "j"}, "kubectl -n egret-system create job j --from=cronjob/egret-etcd-snapshot"},
		{own, "mv ", map[string]string{"-N": "-2"}, "mv /var/lib/egret-etcd/egret-etcd-2 /var/lib/egret-etcd/old-2"},
		{own, "helm upgrade egret charts/egret -n egret-system --reset-then-reuse-values --set etcd.bundled.restoreFrom=FILE", map[string]string{"FILE": "f.db"},
			"helm upgrade egret ROOT/charts/egret -n egret-system --reset-then-reuse-values --set etcd.bundled.restoreFrom=f.db"},
		{own, "helm upgrade egret charts/egret -n egret-system --reset-then-reuse-values --set etcd.bundled.restoreFrom=", nil,
			"helm upgrade egret ROOT/charts/egret -n egret-system --reset-then-reuse-values --set etcd.bundled.restoreFrom="},
		{"Upgrade and rollback", "helm upgrade", map[string]string{"TAG": "2"},
			"helm upgrade egret ROOT/charts/egret -n egret-system --reset-then-reuse-values --set-string image.tag=2"},
		{"Uninstall", "helm uninstall", nil, "helm uninstall egret -n egret-system"},
	} {
		want := strings.Fields(strings.ReplaceAll(tt.want, "ROOT", root))
		if got := documented(t, tt.section, tt.begins, tt.with); !slices.Equal(got, want) {
			t.Errorf("%s of %s: got %q, want %q", tt.begins, tt.section, got, want)
		}
	}
	patch := documented(t, "Uninstall", "kubectl -n egret-system patch daemonset", nil)
	const args = `["cleanup", "--stay", "--sysctl-dir=/host/proc/sys/net"]}]`
	if want := []string{"patch", "daemonset", "egret-agent", "--type=json", "-p"}; len(patch) != 9 || !slices.Equal(patch[3:8], want) || !strings.HasSuffix(patch[8], args) {
		t.Errorf("the patch is %q", patch)
	}
}
