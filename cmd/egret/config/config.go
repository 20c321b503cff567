// Package config reads the configuration files of the daemons, --config: YAML with the names of flags.
package config

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"
)

// Set sets the flags that a YAML file of flag names and values has and that were not given. Unknown names are
// errors. A name with dots may also be written as objects, as the guide does: egress.exceptCIDRs is exceptCIDRs below
// egress.
func Set(s *pflag.FlagSet, file string) error {
	if file == "" {
		return nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("reading --config: %w", err)
	}
	var values map[string]any
	if err := yaml.Unmarshal(b, &values); err != nil {
		return fmt.Errorf("reading --config %s: %w", file, err)
	}
	flat, err := flatten("", values)
	errs := []error{err}
	for _, name := range slices.Sorted(maps.Keys(flat)) {
		value := flat[name]
		if s.Lookup(name) == nil || name == "config" {
			errs = append(errs, fmt.Errorf("there is no option %q", name))
			continue
		}
		if s.Changed(name) {
			continue
		}
		if err := s.Set(name, text(value)); err != nil {
			errs = append(errs, fmt.Errorf("option %q: %w", name, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("reading --config %s: %w", file, err)
	}
	return nil
}

// flatten joins the names of objects in objects with dots. One name written in both ways is an error.
func flatten(above string, values map[string]any) (map[string]any, error) {
	flat := map[string]any{}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(values)) {
		below := map[string]any{above + key: values[key]}
		if object, ok := values[key].(map[string]any); ok {
			var err error
			below, err = flatten(above+key+".", object)
			errs = append(errs, err)
		}
		for name, value := range below {
			if _, twice := flat[name]; twice {
				errs = append(errs, fmt.Errorf("option %q is there twice", name))
			}
			flat[name] = value
		}
	}
	return flat, errors.Join(errs...)
}

// text returns what is written on a command line for a value of a YAML file.
func text(value any) string {
	switch v := value.(type) {
	case nil:
		return ""
	case float64: // as all numbers are
		return strconv.FormatFloat(v, 'f', -1, 64)
	case []any:
		var items []string
		for _, item := range v {
			items = append(items, text(item))
		}
		return strings.Join(items, ",")
	}
	return fmt.Sprint(value)
}
