// Command render prints what Helm makes of the chart of Egret, with Helm's own engine and its check of the values by
// the chart's schema:
//
//	render [-values FILE]... [-namespace NAME] [-out FOLDER] [-kubeconfig FILE] [-notes] CHART
//
// With -out each template becomes a file of that folder, named as the template is; so manifests/deploy is made. With
// -kubeconfig the function lookup asks that cluster, as it does in helm install and helm upgrade; else it finds
// nothing, as in helm template. With -notes it prints what helm install tells the user, and no manifests.
package main

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"k8s.io/client-go/tools/clientcmd"
)

const notesFile = "NOTES.txt"

func main() {
	var files []string
	flag.Func("values", "file of values, later ones win", func(file string) error { files = append(files, file); return nil })
	namespace := flag.String("namespace", "egret-system", "namespace of the release")
	out := flag.String("out", "", "folder to write a file for each template to")
	kubeconfig := flag.String("kubeconfig", "", "cluster that lookup asks")
	notes := flag.Bool("notes", false, "print what helm install says at its end, rather than manifests")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "render: want the folder of one chart")
		os.Exit(2)
	}
	rendered, err := render(flag.Arg(0), files, *namespace, *kubeconfig)
	told := rendered[notesFile]
	delete(rendered, notesFile) // Helm applies it to no cluster either
	switch {
	case err != nil:
	case *notes:
		fmt.Print(told)
	default:
		err = write(rendered, *out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}

// render returns the files that the chart's templates make, by name, without those that come out empty.
func render(dir string, files []string, namespace, kubeconfig string) (map[string]string, error) {
	chart, err := loader.Load(dir)
	if err != nil {
		return nil, fmt.Errorf("loading the chart: %w", err)
	}
	values := map[string]any{}
	for _, file := range files {
		more, err := chartutil.ReadValuesFile(file)
		if err != nil {
			return nil, fmt.Errorf("reading values %s: %w", file, err)
		}
		values = chartutil.MergeTables(more, values) // what is in the first wins
	}
	// Checks the values by values.schema.json, too.
	all, err := chartutil.ToRenderValues(chart, values, chartutil.ReleaseOptions{Name: "egret", Namespace: namespace, IsInstall: true}, nil)
	if err != nil {
		return nil, err
	}
	var made map[string]string
	if kubeconfig == "" {
		made, err = engine.Render(chart, all)
	} else {
		config, bad := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if bad != nil {
			return nil, fmt.Errorf("reading %s: %w", kubeconfig, bad)
		}
		made, err = engine.RenderWithClient(chart, all, config)
	}
	if err != nil {
		return nil, err
	}
	rendered := map[string]string{}
	for name, text := range made {
		if name := path.Base(name); !strings.HasPrefix(name, "_") && strings.TrimSpace(text) != "" {
			rendered[name] = strings.TrimSpace(text) + "\n"
		}
	}
	return rendered, nil
}

func write(rendered map[string]string, dir string) error {
	for i, name := range slices.Sorted(maps.Keys(rendered)) {
		if dir != "" {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(rendered[name]), 0o644); err != nil {
				return err
			}
			continue
		}
		if i > 0 {
			fmt.Println("---")
		}
		fmt.Print(rendered[name])
	}
	return nil
}
