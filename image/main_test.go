package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// Two builds, of two copies of the sources in folders with other names, at other times and with other modes of files,
// are one.
func TestTwoBuildsAreOneImage(t *testing.T) {
	t.Parallel()
	c := config{source: "..", version: "v1.2.3", revision: "0123abcd", name: "registry.example/egret:v1.2.3", archs: []string{runtime.GOARCH}, created: time.Unix(1700000000, 0).UTC()}
	dir := t.TempDir()
	first, other := filepath.Join(dir, "first.tar"), filepath.Join(dir, "other.tar")
	index := write(t, c, first)
	again := c
	again.source = copied(t)
	if digest(t, index) != digest(t, write(t, again, other)) {
		t.Error("two builds have two digests")
	}
	if sum(t, first) != sum(t, other) {
		t.Error("two builds have one digest and two archives")
	}
	again.revision = "4567cdef"
	if digest(t, index) == digest(t, write(t, again, other)) {
		t.Error("another revision has the same digest")
	}
	looksRight(t, c, first)
}

// looksRight looks at the archive as those do who get it.
func looksRight(t *testing.T, c config, file string) {
	t.Helper()
	dir := unpacked(t, file)
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil { // sizes, digests and types of all that is in it
		t.Fatal(err)
	}
	top, err := index.IndexManifest()
	if err != nil || len(top.Manifests) != 1 || top.Manifests[0].Annotations["io.containerd.image.name"] != c.name {
		t.Fatalf("the archive lists %+v, %v: want one image named %s", top, err, c.name)
	}
	inner, err := index.ImageIndex(top.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	list, err := inner.IndexManifest()
	if err != nil || len(list.Manifests) != 1 || list.Manifests[0].Platform.Architecture != runtime.GOARCH {
		t.Fatalf("the image is for %+v, %v: want %s alone", list, err, runtime.GOARCH)
	}
	image, err := inner.Image(list.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	isAsTheDockerfileSays(t, c, image)
	runs(t, c, image)
}

// isAsTheDockerfileSays compares the image with the instructions after the last FROM.
func isAsTheDockerfileSays(t *testing.T, c config, image v1.Image) {
	t.Helper()
	file, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	_, last, ok := strings.Cut(string(b), "\nFROM scratch\n")
	if !ok {
		t.Fatal("the Dockerfile does not end with an image from scratch")
	}
	labels := map[string]string{}
	says := strings.NewReplacer("$VERSION", c.version, "$REVISION", c.revision)
	for _, m := range regexp.MustCompile(`(?m)^LABEL (\S+)="(.*)"$`).FindAllStringSubmatch(last, -1) {
		labels[m[1]] = says.Replace(m[2])
	}
	if len(labels) < 5 || len(labels) != len(file.Config.Labels) {
		t.Errorf("labels are %v, those of the Dockerfile %v", file.Config.Labels, labels)
	}
	for name, want := range labels {
		if got := file.Config.Labels[name]; got != want {
			t.Errorf("label %s is %q, the Dockerfile's %q", name, got, want)
		}
	}
	for _, line := range []string{
		"USER " + file.Config.User, `ENTRYPOINT ["` + strings.Join(file.Config.Entrypoint, `", "`) + `"]`,
		`ENV ` + strings.Replace(file.Config.Env[0], "=", `="`, 1) + `"`, "COPY --from=build /egret /egret-etcd /" + folder,
	} {
		if !strings.Contains(last, "\n"+line+"\n") {
			t.Errorf("the Dockerfile does not say %s", line)
		}
	}
	if uid, _, _ := strings.Cut(file.Config.User, ":"); uid == "" || uid == "0" || uid == "root" {
		t.Errorf("the image's user is %q", file.Config.User)
	}
}

// Docker's image of Go builds with the Go that it has, whatever go.mod says (GOTOOLCHAIN=local), and its standard
// library is in what is shipped: the Dockerfile names the one of go.mod, as does the builder of the image without
// Docker.
func TestTheDockerfileBuildsWithTheGoOfGoMod(t *testing.T) {
	t.Parallel()
	one := func(file, pattern string) string {
		t.Helper()
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(pattern).FindSubmatch(b)
		if m == nil {
			t.Fatalf("%s has nothing like %s", file, pattern)
		}
		return string(m[1])
	}
	want := one("../go.mod", `(?m)^toolchain go([0-9.]+)$`)
	for file, pattern := range map[string]string{"go.mod": `(?m)^toolchain go([0-9.]+)$`, "Dockerfile": `(?m)^FROM .*\bgolang:([0-9.]+) AS build$`} {
		if got := one(file, pattern); got != want {
			t.Errorf("%s has Go %s, want that of the repository's go.mod, %s", file, got, want)
		}
	}
}

// runs runs what is in the image, without anything else: it is static.
func runs(t *testing.T, c config, image v1.Image) {
	t.Helper()
	layers, err := image.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dir := t.TempDir()
	var files []string
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Mode&0o022 != 0 {
			t.Errorf("%s is of %d with mode %o: the image's user could change it", h.Name, h.Uid, h.Mode)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		files = append(files, filepath.Base(h.Name))
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("ld-linux")) {
			t.Error("the binary wants a dynamic loader, which the image has not")
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(h.Name)), b, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(files, binaries) {
		t.Errorf("files are %v, want %v alone", files, binaries)
	}
	for _, name := range files {
		out, err := exec.Command(filepath.Join(dir, name), "--version").CombinedOutput()
		if err != nil || !strings.Contains(string(out), c.version) {
			t.Errorf("%s --version: %v, %s: want %s", name, err, out, c.version)
		}
	}
}

func write(t *testing.T, c config, out string) v1.ImageIndex {
	t.Helper()
	index, err := c.build()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.write(index, out); err != nil {
		t.Fatal(err)
	}
	return index
}

func digest(t *testing.T, index v1.ImageIndex) string {
	t.Helper()
	d, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

func sum(t *testing.T, file string) [sha256.Size]byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// copied copies what git has of the repository: all of it, for what is embedded next has another name again.
func copied(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "elsewhere")
	list := exec.Command("git", "ls-files", "-z")
	list.Dir = ".."
	out, err := list.Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	for _, name := range strings.Split(strings.TrimRight(string(out), "\x00"), "\x00") {
		b, err := os.ReadFile(filepath.Join("..", name))
		if errors.Is(err, os.ErrNotExist) {
			continue // deleted, and not committed yet
		}
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func unpacked(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, h.Name)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
