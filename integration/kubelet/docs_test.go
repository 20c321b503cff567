package kubelet

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	remark = regexp.MustCompile(`\s\s+#.*`)
	// placeholder is what a user writes something else for, as a variable of the shell or by hand.
	placeholder = regexp.MustCompile(`\$?\b[A-Z]{3,}\b`)
)

// documented returns the words of a command of docs/install.md: of the first one of a section that begins so. What the
// user is to write in place of a word in capitals is in with, and folders of the repository are named by their paths.
func documented(t *testing.T, section, begins string, with map[string]string) []string {
	t.Helper()
	b, err := os.ReadFile("../../docs/install.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "\n## "+section+"\n")
	if !ok {
		t.Fatalf("docs/install.md has no section %q", section)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	_, text, ok = strings.Cut(text, "\n    "+begins)
	if !ok {
		t.Fatalf("docs/install.md, %s: no command begins with %q", section, begins)
	}
	line, _, _ := strings.Cut(strings.ReplaceAll(begins+text, "\\\n", ""), "\n")
	line = placeholder.ReplaceAllStringFunc(remark.ReplaceAllString(line, ""), func(name string) string {
		value, ok := with[strings.TrimPrefix(name, "$")]
		if !ok {
			t.Fatalf("docs/install.md, %s: %q: what is %s?", section, line, name)
		}
		return value
	})
	words := strings.Fields(line)
	for i, w := range words {
		if strings.HasPrefix(w, "charts/") || strings.HasPrefix(w, "manifests/") {
			if words[i], err = filepath.Abs("../../" + w); err != nil {
				t.Fatal(err)
			}
		}
	}
	return words
}

func TestCommandsAreThoseOfThePage(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		section, begins string
		with            map[string]string
		want            string
	}{
		{"Quick", "helm install", map[string]string{"REPOSITORY": "registry:5000/egret", "TAG": "1"},
			"helm install egret ROOT/charts/egret -n egret-system --create-namespace -f ROOT/manifests/examples/values/bundled-etcd.yaml " +
				"--set image.repository=registry:5000/egret --set-string image.tag=1"},
		{"Chart", "helm install", map[string]string{"VALUES": "/v.yaml"}, "helm install egret ROOT/charts/egret -n egret-system -f /v.yaml"},
		{"Upgrade and rollback", "helm upgrade", map[string]string{"TAG": "2"},
			"helm upgrade egret ROOT/charts/egret -n egret-system --reset-then-reuse-values --set-string image.tag=2"},
		{"Uninstall", "helm uninstall", nil, "helm uninstall egret -n egret-system"},
	} {
		want := strings.Fields(strings.ReplaceAll(tt.want, "ROOT", root))
		if got := documented(t, tt.section, tt.begins, tt.with); !slices.Equal(got, want) {
			t.Errorf("%s of %s: got %q, want %q", tt.begins, tt.section, got, want)
		}
	}
}
