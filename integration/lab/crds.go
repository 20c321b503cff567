package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/manifests"
)

// createCRDs creates Egret's CRDs and returns when the API server serves them.
func (l *Lab) createCRDs(ctx context.Context) error {
	c, err := apiextensions.NewForConfig(l.cluster.rest())
	if err != nil {
		return fmt.Errorf("making a client of the API server: %w", err)
	}
	crds := c.ApiextensionsV1().CustomResourceDefinitions()
	files, err := fs.Glob(manifests.FS, "crds/*.yaml")
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return errors.New("package manifests has no CRDs")
	}
	var names []string
	for _, file := range files {
		b, err := fs.ReadFile(manifests.FS, file)
		if err != nil {
			return err
		}
		crd := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(b, crd); err != nil {
			return fmt.Errorf("reading %s: %w", file, err)
		}
		if _, err := crds.Create(ctx, crd, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("creating CRD %s: %w", crd.Name, err)
		}
		names = append(names, crd.Name)
	}
	return l.wait(ctx, "the CRDs", readyTimeout, []string{apiProc}, func(ctx context.Context) error {
		for _, name := range names {
			crd, err := crds.Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if !established(crd) {
				return fmt.Errorf("%s is not established", name)
			}
		}
		return nil
	})
}

func established(crd *apiextensionsv1.CustomResourceDefinition) bool {
	for _, c := range crd.Status.Conditions {
		if c.Type == apiextensionsv1.Established {
			return c.Status == apiextensionsv1.ConditionTrue
		}
	}
	return false
}
