// SPDX-License-Identifier: Apache-2.0

// Package glob matches names against patterns. In a pattern, `*` stands for any number
// of characters, including none, and every other character stands for itself.
package glob

import (
	"slices"
	"strings"
)

// Any reports whether one of patterns matches name as a whole.
func Any(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return Match(pattern, name) })
}

// Match reports whether pattern matches name as a whole.
func Match(pattern, name string) bool {
	first, rest, wildcard := strings.Cut(pattern, "*")
	if !wildcard {
		return name == pattern
	}
	parts := strings.Split(rest, "*")
	last := parts[len(parts)-1]
	if len(name) < len(first)+len(last) || !strings.HasPrefix(name, first) || !strings.HasSuffix(name, last) {
		return false
	}
	name = name[len(first) : len(name)-len(last)]
	for _, part := range parts[:len(parts)-1] {
		_, after, found := strings.Cut(name, part)
		if !found {
			return false
		}
		name = after
	}
	return true
}
