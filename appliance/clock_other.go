//go:build !linux

package appliance

import (
	"errors"
	"time"
)

func setClock(time.Time) error {
	return errors.New("only an appliance's clock is set, which runs Linux")
}
